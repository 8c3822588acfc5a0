"""The model repository: layout, configurations, and which versions are served."""
