"""stub"""
def blend_epoch(batches, table, num_replicas):
    return batches
