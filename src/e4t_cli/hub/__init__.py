"""Files of the Hugging Face hub: resolved, downloaded, verified, cached."""
