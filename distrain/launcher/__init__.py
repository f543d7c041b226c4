"""`distrain launch`, the parent of a node's worker processes; it never imports torch.

launch: the whole of it · cluster: which node this is, from SLURM, Kubernetes or options · workers: started, signalled,
waited for · verdict: the exit code from how they ended · attempt: RUN/exit.json, and attempts without progress.
"""
