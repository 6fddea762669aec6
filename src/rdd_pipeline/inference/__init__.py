"""Using a trained network: images in, masks out."""
