"""The ComfyUI nodes: thin adapters around ``sid_train.core``."""
