"""Runs a Batch on a model: TorchScript + FBGEMM, ONNX Runtime, or a programmable fake."""
