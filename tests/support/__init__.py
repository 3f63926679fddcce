"""What several tests share: tiny models, independent references, processes."""
