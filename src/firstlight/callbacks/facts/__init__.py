"""What is known of a run beside its series: options, network, outputs, loss, data."""
