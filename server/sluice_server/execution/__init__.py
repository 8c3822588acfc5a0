"""Running models: providers, threads, sessions, instances. The only part that imports ONNX Runtime."""
