"""The embedded model tiny/sd, its judge tiny/clip, LMC-SDS's corrective: how they are made."""
