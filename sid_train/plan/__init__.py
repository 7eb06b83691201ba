"""``sid_train plan``: what a run needs, before hardware is rented for it."""
