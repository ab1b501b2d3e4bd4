"""What the training scripts share. Functions, no Trainer: each script in training/ is its own visible loop."""
