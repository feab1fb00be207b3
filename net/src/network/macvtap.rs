//! `macvtap`: each NIC is a macvtap on an interface of the host, which stays as it is.

use model::Name;
use serde::{Deserialize, Serialize};

use super::{Claim, Kind, Network, Opened, Request, options, refuse_vlans, refused, table};
use crate::link::{Link, LinkForm, MacvtapMode};
use crate::part::Part;
use crate::port::{PortRequest, rates};
use crate::{HostView, IfName, NetError};

pub(super) const KIND: Kind = Kind {
    name: "macvtap",
    about: "each NIC is a macvtap on an interface of the host, and does not reach the host itself",
    options: &["uplink", "mode"],
    segment: false,
    programs: &[],
    modules: &["macvtap"],
    define,
    open,
};

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    uplink: IfName,
    #[serde(default)]
    mode: MacvtapMode,
}

#[derive(Debug)]
struct Macvtap {
    name: Name,
    options: Options,
}

fn define(request: &Request<'_>) -> Result<toml::Table, NetError> {
    let options: Options = options(&KIND, request.network, request.options.clone())?;
    if request.view.link(&options.uplink).is_none() {
        return Err(NetError::NoInterface { name: options.uplink });
    }
    table(request.network, &options)
}

fn open(name: &Name, table: toml::Table) -> Opened {
    Ok(Box::new(Macvtap { name: name.clone(), options: options(&KIND, name, table)? }))
}

impl Network for Macvtap {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn summary(&self) -> String {
        format!("on {}, mode {}", self.options.uplink, self.options.mode.as_str())
    }

    fn claim(&self) -> Claim {
        Claim { network: self.name.clone(), subnets: Vec::new(), interfaces: Vec::new(), macs: Vec::new() }
    }

    fn parts(&self, view: &HostView) -> Result<Vec<Part>, NetError> {
        match view.link(&self.options.uplink) {
            Some(_) => Ok(Vec::new()),
            None => Err(NetError::NoInterface { name: self.options.uplink.clone() }),
        }
    }

    fn port(&self, port: &IfName, request: &PortRequest) -> Result<Vec<Part>, NetError> {
        refuse_vlans(&self.name, &KIND, request)?;
        if request.isolated {
            let why =
                "a macvtap is isolated from all others or from none: define the network with --mode private";
            return Err(refused(&self.name, why));
        }
        let mut parts = vec![Part::Link(Link {
            name: port.clone(),
            network: self.name.clone(),
            form: LinkForm::Macvtap {
                lower: self.options.uplink.clone(),
                mode: self.options.mode,
                owner: request.owner,
            },
            // The guest's NIC has to have the same: nothing else reaches it.
            mac: request.mac,
            mtu: request.mtu,
            bridge: None,
            ipv6: false,
        })];
        parts.extend(rates(&self.name, port, request));
        Ok(parts)
    }
}
