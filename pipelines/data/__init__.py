"""Curation: from raw video to published token shards, in durable stages on Ray Data."""
