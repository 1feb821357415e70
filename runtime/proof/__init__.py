"""The numeric proof: the shards, run at their own mesh, against an independent reference, whole or layer by layer."""
