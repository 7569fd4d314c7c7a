"""Files of the Hugging Face hub: fetched once, checked, and found again.

They lie in the hub's own cache, beside those of every other program, so that a Stable Diffusion
that is on this machine already is used. What this program derives from them, and what it remembers
about them, lies in a cache of its own. Nothing here imports huggingface_hub before it is needed.

Modules are imported one by one: whoever only asks where something lies loads nothing that fetches.
"""
