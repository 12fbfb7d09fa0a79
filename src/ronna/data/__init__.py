"""From files to the samples of a step: records, token shards, packing, mixtures and order."""
