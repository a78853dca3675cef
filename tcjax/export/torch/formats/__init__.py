"""Files that only PyTorch can write or read: pickled weights, torch.export programs, ONNX graphs."""
