"""Creates ami/stack.yaml against moto, and looks at what came of it.

Run by tests/ami/check, in a virtual environment with the versions in requirements.txt.
"""

import base64
import json
import os
import sys
import unittest

import boto3
import yaml
from moto import mock_aws

TEMPLATE = open(sys.argv.pop(1), encoding="utf-8").read()
REGION = "eu-west-1"
os.environ.update(
    AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION=REGION
)


class AnyTag(yaml.SafeLoader):
    """Reads CloudFormation's own tags (`!Ref`) as nothing."""


AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


@mock_aws
class Stack(unittest.TestCase):
    def create(self, **parameters):
        """Creates the stack "mirrors" in the default VPC's subnets; returns its outputs."""
        ec2 = boto3.client("ec2")
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        subnets = ec2.describe_subnets()["Subnets"]
        self.subnets = {subnet["SubnetId"] for subnet in subnets}
        parameters = {
            "ImageId": ec2.describe_images()["Images"][0]["ImageId"],
            "VpcId": vpc,
            "SubnetIds": ",".join(subnet["SubnetId"] for subnet in subnets),
            **parameters,
        }
        formation = boto3.client("cloudformation")
        formation.create_stack(
            StackName="mirrors",
            TemplateBody=TEMPLATE,
            Capabilities=["CAPABILITY_IAM"],
            Parameters=[
                {"ParameterKey": key, "ParameterValue": value}
                for key, value in parameters.items()
            ],
        )
        stack = formation.describe_stacks(StackName="mirrors")["Stacks"][0]
        self.assertEqual(stack["StackStatus"], "CREATE_COMPLETE")
        return {item["OutputKey"]: item["OutputValue"] for item in stack["Outputs"]}

    def group(self):
        scaling = boto3.client("autoscaling")
        (group,) = scaling.describe_auto_scaling_groups()["AutoScalingGroups"]
        return group

    def template_data(self):
        ec2 = boto3.client("ec2")
        (version,) = ec2.describe_launch_template_versions(Versions=["$Latest"])[
            "LaunchTemplateVersions"
        ]
        return version["LaunchTemplateData"]

    def configuration(self):
        """The agent's configuration, as an instance's user-data has it written."""
        text = base64.b64decode(self.template_data()["UserData"]).decode()
        self.assertTrue(text.startswith("#cloud-config\n"), text)
        (file,) = yaml.safe_load(text)["write_files"]
        self.assertEqual(file["path"], "/etc/registry-agent/config.yaml")
        return yaml.safe_load(file["content"])

    def policies(self):
        iam = boto3.client("iam")
        (role,) = iam.list_roles()["Roles"]
        names = iam.list_role_policies(RoleName=role["RoleName"])["PolicyNames"]
        found = {}
        for name in names:
            policy = iam.get_role_policy(RoleName=role["RoleName"], PolicyName=name)
            document = policy["PolicyDocument"]
            found[name] = document if isinstance(document, dict) else json.loads(document)
        return found

    def test_a_fleet_behind_a_load_balancer(self):
        outputs = self.create(Instances="3")
        self.assertEqual(outputs["Mirror"], "http://docker-mirror.registry.internal")

        group = self.group()
        self.assertEqual(
            (group["MinSize"], group["DesiredCapacity"], len(group["Instances"])), (3, 3, 3)
        )
        # Where its instances are is not what moto takes from this, but what EC2 does.
        self.assertEqual(set(group["VPCZoneIdentifier"].split(",")), self.subnets)
        self.assertGreater(len(self.subnets), 1, "one zone alone")
        self.assertEqual(group["HealthCheckType"], "EC2")
        tags = {tag["Key"]: tag["Value"] for tag in group["Tags"]}
        self.assertEqual(tags["registry-agent"], "mirror")

        # moto makes no hooks of a group's own list, which EC2 has before it starts an instance.
        mirrors = yaml.load(TEMPLATE, AnyTag)["Resources"]["Mirrors"]["Properties"]
        hooks = {
            hook["LifecycleTransition"].rsplit(":")[-1]: hook["DefaultResult"]
            for hook in mirrors["LifecycleHookSpecificationList"]
        }
        self.assertEqual(
            hooks,
            {"EC2_INSTANCE_LAUNCHING": "ABANDON", "EC2_INSTANCE_TERMINATING": "CONTINUE"},
        )

        elb = boto3.client("elbv2")
        (balancer,) = elb.describe_load_balancers()["LoadBalancers"]
        self.assertEqual((balancer["Scheme"], balancer["Type"]), ("internal", "application"))
        (listener,) = elb.describe_listeners(LoadBalancerArn=balancer["LoadBalancerArn"])[
            "Listeners"
        ]
        self.assertEqual(listener["Port"], 80)
        (targets,) = elb.describe_target_groups()["TargetGroups"]
        self.assertEqual((targets["Port"], targets["HealthCheckPath"]), (5000, "/"))
        self.assertEqual(
            listener["DefaultActions"][0]["TargetGroupArn"], targets["TargetGroupArn"]
        )
        self.assertEqual(group["TargetGroupARNs"], [targets["TargetGroupArn"]])

        (zone,) = boto3.client("route53").list_hosted_zones()["HostedZones"]
        # moto takes it for public all the same.
        declared = yaml.load(TEMPLATE, AnyTag)["Resources"]["Zone"]["Properties"]
        self.assertEqual(list(declared["VPCs"][0]), ["VPCId", "VPCRegion"])
        records = boto3.client("route53").list_resource_record_sets(HostedZoneId=zone["Id"])
        (record,) = [
            record for record in records["ResourceRecordSets"] if "AliasTarget" in record
        ]
        self.assertEqual(record["Name"].rstrip("."), "docker-mirror.registry.internal")
        self.assertIn(balancer["DNSName"], record["AliasTarget"]["DNSName"])

        self.assertEqual(
            self.configuration(),
            {
                "role": "mirror",
                "listen": ":5000",
                "fleet": {
                    "autoscaling": {"group": "mirrors"},
                    "load_balancer": {"target_group": targets["TargetGroupArn"]},
                },
            },
        )
        # The balancer finds them: they need to change no record.
        self.assertEqual(set(self.policies()), {"fleet", "targets"})
        self.instances_are_as_closed_as_they_can_be()
        self.nobody_else_reads_the_bucket(outputs["BucketName"])

    def test_a_fleet_with_records_of_its_own(self):
        outputs = self.create(LoadBalancer="no", MakeBucket="no")
        self.assertNotIn("BucketName", outputs)
        self.assertEqual(boto3.client("s3").list_buckets()["Buckets"], [])
        self.assertEqual(outputs["Mirror"], "http://docker-mirror.registry.internal:5000")
        self.assertEqual(boto3.client("elbv2").describe_load_balancers()["LoadBalancers"], [])
        (zone,) = boto3.client("route53").list_hosted_zones()["HostedZones"]
        zone = zone["Id"].rsplit("/", 1)[-1]
        dns = self.configuration()["fleet"]["dns"]
        self.assertEqual(
            dns, {"route53": {"zone": zone, "name": "docker-mirror.registry.internal"}}
        )
        statements = self.policies()["records"]["Statement"]
        (change,) = [
            it for it in statements if it["Action"] == "route53:ChangeResourceRecordSets"
        ]
        self.assertTrue(change["Resource"].endswith(f"hostedzone/{zone}"), change)
        names = change["Condition"]["ForAllValues:StringEquals"]
        self.assertEqual(
            names["route53:ChangeResourceRecordSetsNormalizedRecordNames"],
            ["docker-mirror.registry.internal"],
        )

    def instances_are_as_closed_as_they_can_be(self):
        data = self.template_data()
        self.assertEqual(data["MetadataOptions"]["HttpTokens"], "required")
        (disk,) = data["BlockDeviceMappings"]
        self.assertIn(disk["Ebs"]["Encrypted"], (True, "true"))
        everywhere = {
            action
            for policy in self.policies().values()
            for statement in policy["Statement"]
            if statement["Resource"] == "*"
            for action in statement["Action"]
        }
        self.assertEqual(
            {action for action in everywhere if ":Describe" not in action},
            set(),
            "changes without a resource that they are limited to",
        )

    def nobody_else_reads_the_bucket(self, name):
        s3 = boto3.client("s3")
        # moto's CloudFormation does not take this over to the bucket.
        bucket = yaml.load(TEMPLATE, AnyTag)["Resources"]["Bucket"]
        block = bucket["Properties"]["PublicAccessBlockConfiguration"]
        self.assertEqual(list(block.values()), [True] * 4, block)
        self.assertEqual(bucket["DeletionPolicy"], "Retain")
        rules = s3.get_bucket_encryption(Bucket=name)
        self.assertIn("AES256", json.dumps(rules))
        iam = boto3.client("iam")
        actions = {}
        for policy in iam.list_policies(Scope="Local")["Policies"]:
            version = iam.get_policy_version(
                PolicyArn=policy["Arn"], VersionId=policy["DefaultVersionId"]
            )
            document = version["PolicyVersion"]["Document"]
            document = document if isinstance(document, dict) else json.loads(document)
            key = "writer" if "Writer" in policy["PolicyName"] else "reader"
            for statement in document["Statement"]:
                self.assertIn(name, statement["Resource"])
                action = statement["Action"]
                actions.setdefault(key, set()).update(
                    [action] if isinstance(action, str) else action
                )
        self.assertEqual(actions["reader"], {"s3:GetObject", "s3:ListBucket"})
        self.assertNotIn("s3:*", actions["writer"])


if __name__ == "__main__":
    unittest.main()
