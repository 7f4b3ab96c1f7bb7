"""What `self.log` wrote: kept where it was made, reduced over steps, epochs and ranks, shown in tables."""
