"""Helpers that several test areas share: tiny models, a real server in this process, requests, and fakes."""
