"""HTTP: the Open Inference Protocol's REST form, in a thread of its own beside the gRPC transport."""
