"""The network and its loaders."""
