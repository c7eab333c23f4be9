"""Folded weights: live in the graph, or kept outside it and true to the parameters."""
