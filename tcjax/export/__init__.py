"""Take a trained compressor away: one folder that loads, checks itself and explains itself with PyTorch alone."""
