"""Virtual time: the real engine and pilot, with a plant in place of the model's forward pass."""
