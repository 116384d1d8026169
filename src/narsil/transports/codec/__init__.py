"""One module per wire: bytes to Features, scores to bytes. Pure functions, no sockets."""
