"""Export to torch, ONNX and OpenVINO."""
