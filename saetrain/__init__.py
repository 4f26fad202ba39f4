"""Train sparse autoencoders from a cache of activations."""
