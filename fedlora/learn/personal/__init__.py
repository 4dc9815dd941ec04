"""One site's own adapter: what serves its rows best between the global adapter and what it has learned by itself."""
