"""`distrain launch`, the parent of the worker processes; it never imports torch.

launch: start this node's workers and wait for them · cluster: which node this is, from SLURM, Kubernetes or options.
"""
