"""What a mask is worth: fine-tune a real model on it and look at what was learned and what was forgotten."""
