"""What networks take on a device, in PyTorch or in ONNX Runtime: measuring, and the table of latencies for a search."""
