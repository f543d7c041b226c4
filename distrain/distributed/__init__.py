"""One process among others: launched, joined, watched, asked to stop.

launcher (or another one) → nodes: which node this is → rendezvous: all find each other → runtime: what they do
together. On the way: signals (asked to stop), watch (time-outs acted upon), peer_store (words beside collectives), beacon
(where a process is), failures (why it ended, and its exit code).
"""
