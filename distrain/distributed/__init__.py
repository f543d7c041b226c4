"""One worker process among its peers.

runtime: devices, precision, what accelerate prepares · gradients: forward and backward passes under DDP · collectives:
sums and agreements · rendezvous: how the processes find each other · watchdog: time-outs · peer_store: error records
beside the collectives · accelerate_check: what `accelerate launch` was asked for.
"""
