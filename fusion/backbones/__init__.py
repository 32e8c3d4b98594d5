"""Training of the image and video backbones."""
