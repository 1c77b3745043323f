"""How the batches of an epoch are dealt to steps of replicas, and steps to updates of the optimizer."""
