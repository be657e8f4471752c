"""The core: sites, units, hosts, the bank and the adapter file."""
