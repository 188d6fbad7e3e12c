"""Every function of the library by one name: `import attnjax.functional as F`."""
