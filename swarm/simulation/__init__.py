"""A swarm of thousands on a virtual clock, deterministic for a seed: what ships, in a world that does not.

What is real: the lane's decisions (`swarm.lane`), the claim policy (`swarm.claims`), every rule of the records
(`dht_schemas`: envelopes signed with real Ed25519 keys, the trusted set of each peer, the validator of each DHT node).
What is a model: clocks, network, DHT, trainers.

  verifying.py  each distinct envelope is verified once; what honest peers would have verified is counted
  world.py      virtual clock, messages (delay, loss, duplication, reordering, partition), the DHT's replicas
  sightings.py  what one peer has read, as the policy sees it
  peers.py      an honest peer: carries a lane's requests out
  liars.py      forger, replayer, squatter
  measures.py   duplicate work, orphans, records, all held
  scenario.py   a scenario and its run
"""
