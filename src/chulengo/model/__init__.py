"""Model folders: finding, loading, quantising, adapting, and the memory plan."""
