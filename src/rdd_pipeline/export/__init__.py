"""A trained network as a file that runs without this project: ONNX, torch.export, int8."""
