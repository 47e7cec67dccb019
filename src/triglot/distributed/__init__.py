"""Several processes that train one model: the only place that talks to torch.distributed."""
