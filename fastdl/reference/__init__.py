"""The meaning of each op in plain PyTorch, forward and backward by explicit formula: what every back end is checked
against."""
