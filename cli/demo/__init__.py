"""`paris-swarm demo`: a real swarm on this machine, driven through the same command line that people use.

processes.py    the processes it starts, and how every one of them ends
traffic.py      bytes that each p2pd sent, from the kernel; sockets that a trainer holds (none)
figures.py      how recognisable the pictures are, beside real held-out ones
story.py        the steps of the demo, in order, and report.json
"""
