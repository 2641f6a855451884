"""What training adds to the model: images, kept features, gradients in blocks, checkpoints."""
