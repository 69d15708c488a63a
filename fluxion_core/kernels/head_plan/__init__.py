"""Plans of a layer on the GPU: look, features, network, choice; see launch.py."""
