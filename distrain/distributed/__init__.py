"""One worker process among its peers.

runtime: devices, precision, what accelerate prepares · gradients: forward and backward passes under DDP · collectives:
sums and agreements · losses: whether a peer is gone · rendezvous: how the processes find each other · interfaces: of
the network · watchdog: time-outs · peers: failures of other processes · peer_store: error records beside the
collectives · liveness: ends of processes · accelerate_check: the settings of `accelerate launch`.
"""
