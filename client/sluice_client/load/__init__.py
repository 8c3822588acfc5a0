"""Open-loop load: requests sent at given times, what became of each, and which rate a server can hold."""
