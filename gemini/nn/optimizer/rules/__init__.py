"""What optimizers compute and which states they keep: the `rule.Rule` protocol, Adam, and torch's element-wise ones."""
