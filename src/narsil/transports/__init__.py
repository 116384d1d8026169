"""Bytes from the network into Requests, Results back into bytes."""
