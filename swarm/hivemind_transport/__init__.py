"""The real transport: hivemind's DHT and libp2p daemon (p2pd). The only package of the project that imports hivemind.

  record_guard.py    what a node takes in and keeps: validator, dictionaries, bounded storage
  p2pd_control.py    requests to p2pd over its control socket, and the streams that come of them
  p2pd_process.py    p2pd started, with a relay that is ours, and ended
  peer_addresses.py  where peers are reached: dialled, asked for their addresses, remembered
  record_node.py     records stored and read through a DHTNode on the caller's loop
  watchdog.py        keeps the routing table filled
  transport.py       HivemindTransport, which joins them

Why not hivemind's own front door (each point reproduced with hivemind 1.1.12):
  - ``hivemind.DHT`` forks and dies of large messages: a ``DHTNode`` lives on the caller's event loop instead.
  - hivemind's validators let plain values, junk subkeys and endless expirations through: ours refuses all but str
    subkeys with bytes, of bounded size and finite expiration, that pass the caller's check.
  - one refused record makes a reader drop the whole dictionary: ``RecordGuard`` keeps the valid part instead.
  - a reply's own expiration is not checked and decides when a search ends: it is recomputed from the valid records.
  - a refused store can evict the newer record early, and dictionaries grow without bound: ``BoundedStorage``.
  - caches answer with stale dictionaries: all of them are off.
  - ``store`` counts its own copy as success: here True means that another node holds the record.
  - an empty routing table stays empty: a watchdog dials and pings known peers again.
  - a request that fails leaks its socket: ``Control`` closes it.
  - a search that is cancelled leaves its tasks behind: ours are let run to their end, whoever still waits for it.
  - p2pd starts two relay services, and which one answers is decided anew at each start: started until it is ours.
  - p2pd's death is silent, Ctrl-C in a terminal reaches it too: supervised, in a session of its own, killed with us.
"""

from paris_swarm.swarm.hivemind_transport.record_guard import MAX_RECORDS, MAX_SUBKEYS, BoundedStorage, RecordValidator
from paris_swarm.swarm.hivemind_transport.record_node import REPLICAS
from paris_swarm.swarm.hivemind_transport.transport import HivemindTransport

__all__ = ["MAX_RECORDS", "MAX_SUBKEYS", "REPLICAS", "BoundedStorage", "HivemindTransport", "RecordValidator"]
