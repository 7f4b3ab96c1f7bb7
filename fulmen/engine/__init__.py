"""The machine: devices, processes, strategies, precision. Fires no hooks and knows neither Trainer nor Fabric."""
