"""From files to batches: sources, formats, cleaning, selection, the renderer, the ledger, batching."""
