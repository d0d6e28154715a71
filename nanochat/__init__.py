"""nanochat: train a small chat model from nothing, and talk to it."""
